"""Where requests come from: reports, prompt files, traces, drawn lengths and arrival times."""
