"""What is left on disk: videos and pictures with their records, previews, and runs that did not come to their end."""
