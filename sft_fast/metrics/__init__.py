"""What a run says of itself: records, progress, trackers, curves, report, model card."""
