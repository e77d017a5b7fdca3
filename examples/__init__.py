"""Small applications that show repom at work, each in a package of its own."""
