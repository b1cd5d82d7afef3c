"""Every operation, as a generator of calls. Each rule of the library stands in here, or in a script, once.

`namespace`  what all operations share: key names, limits, the check of inputs
`fields`     a flow's hash fields, and what a change does to them
`creation`   creating flows
`changes`    the lifecycle's verbs
`rewriting`  `update_and_append` and `mutate`
`records`    the audit trail and observed steps
`reads`      single flows and listings
`follow`     watching and waiting for changes
`waits`      what a wait engine does
`upkeep`     connecting, deleting, pruning
`doctor`     the health check; `kept`, `server_checks` and `findings` are its parts
"""
