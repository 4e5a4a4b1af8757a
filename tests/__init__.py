"""The tree of vit2dpe/ again: a file is tested in the folder of its room, the ground floor and the pages up here."""
