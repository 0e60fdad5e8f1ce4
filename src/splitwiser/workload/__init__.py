"""Sources of requests: reports, prompt files, traces, random lengths and arrival times."""
