"""Dense captions from GPT4-Vision, or whatever answers as it does: a stage before there is a captioner."""
