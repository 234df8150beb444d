"""What a trained model can do. A task's loss declares which of these it teaches. Experiments and the server require them."""

WRITE_TEXT = "write text"
GENERATE_IMAGES = "generate images"
MATCH = "predict whether inputs match"
LABEL = "predict labels"
ALIGN = "rank by alignment"
