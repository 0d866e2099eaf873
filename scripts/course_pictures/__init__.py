"""Pictures of the assignments: python -m scripts.course_pictures [a03 ...] draws them into their folders."""
