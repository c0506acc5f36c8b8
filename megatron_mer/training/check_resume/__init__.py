"""An exact-resume self test on the user's own configuration; `tools/check_resume.py` runs it."""
