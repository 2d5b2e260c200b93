"""What a model is made of: its blocks, its weights, and the form in which NNCF stores a weight on a grid."""
