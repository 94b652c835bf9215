"""Everything that uses Ray: its start and placement, the actors of engines and rewards, and the commands
`rlx vllm-serve` (`serve`), `rlx run` (`run`) and `rlx check` (`check`)."""
