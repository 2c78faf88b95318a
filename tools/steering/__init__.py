"""The proof of concept steering on mini-sd: erase each class of Fashion-MNIST, judged by a classifier."""
