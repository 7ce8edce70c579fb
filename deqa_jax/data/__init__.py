"""Opinion scores to labels, and the files that labels and images are kept in."""
