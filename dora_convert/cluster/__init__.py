"""Run tasks on the nodes of a cluster, with Ray; Ray alone schedules, retries and carries results."""
