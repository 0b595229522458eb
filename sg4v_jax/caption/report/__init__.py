"""What captions are like: measured, compared, shown beside their images, and voted on."""
