"""The paper's experiments. Each file holds a function of a trained model and a store that returns plain figures."""
