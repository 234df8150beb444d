"""Scenes with ground truth: what the corpus `scenes` shows, says and asks, and how answers and images are judged by it.

    vocabulary  kinds of objects, colours, sizes, grounds, and the words for them
    layout      where objects stand, on the grid of image codes
    truth       scene graphs and scenes
    pictograms  OpenMoji's pictograms, tinted, in two drawing styles
    drawing     a scene as an image
    phrases     the words for relations, places, grounds and counts
    captions    captions of a scene graph
    parser      the scene graph of a caption
    judging     whether a caption is true, and whether it is complete
    holdouts    pairs and bindings that training never shows
    sampling    random scenes of each split
    negatives   captions that differ from the truth in one thing
    questions   questions and their answers
    labels      labels that need binding
    checker     the scene graph of an image
    records     the truth file of a corpus
    random_choices   choices that are the same on every machine

Nothing here imports torch.
"""
