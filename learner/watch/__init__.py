"""What a run says of itself while it runs.

what happened     journal, phases, group_spans, step_metrics, bottleneck, pace
its files         report, records, run_record
its readers       progress and live (the terminal), observer (the gateway's page), trackers and tracker_kinds, otel
"""
