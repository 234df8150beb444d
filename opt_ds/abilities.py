"""What a trained model can do. A task's loss says which of these it teaches; experiments and the server ask for them."""

WRITE_TEXT = "write text"
GENERATE_IMAGES = "generate images"
MATCH = "predict whether inputs match"
LABEL = "predict labels"
