"""The page that shows a run, live or from its files, and the report to hand on.

    metrics, evaluations, events, samples ─► LiveRun (in the gateway, bounded) ─┐
    output_dir/*.jsonl, followed by offset ─► FolderRun (`rlx view OUT`) ───────┴► app.py: JSON routes ─► page/: the page
                                                       └─► report.py: one HTML file

Not here: what a run records (`rlx.learner.watch.report`, the service's events), the terminal (`rlx.sample_view`).
"""
