"""The paper's experiments: each file is a function of a trained model and a store, and gives plain figures."""
