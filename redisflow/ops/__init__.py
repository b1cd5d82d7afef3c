"""Every operation, as a generator of calls. Each rule of the library stands in here, or in a script, once.

`namespace`  what all operations share: key names, limits, the check of inputs
`changes`    creation and the lifecycle's verbs
`records`    the audit trail and observed steps
`reads`      single flows and listings
`follow`     watching and waiting for changes
`waits`      what a wait engine does
`upkeep`     connecting, deleting, pruning
"""
