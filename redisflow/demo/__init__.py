"""`redisflow demo`: worker processes share one flow per source file, and the outcome is checked in full.

    coordinator  creates the flows, requests cancels, kills one worker, draws the progress
    worker ×4    claims flows and takes them through read → parse → count → finish
    reviewer     answers the flows that wait for a review
    engine       resumes timers, cancels waiting flows
    recount      counts the same files again, in one process and without flows
    verify       compares flows, audit trails, indexes and totals

Only `coordinator` and `screen` need the `cli` extra; the other processes do not load it.
"""
