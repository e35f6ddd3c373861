"""Template and curves of `mmrlhf.report`."""
