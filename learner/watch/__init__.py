"""What a run says of itself while it runs: files, events, spans, the terminal, trackers, the gateway's page."""
