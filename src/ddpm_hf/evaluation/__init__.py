"""What a model is worth: measured in parts that processes share and that survive an interruption.

images       a data set as the model sees it
parts        work in parts, kept on disk until all are there
likelihood   bits/dim of the images
report       the JSON file, the table, the lines for the model card
plots        bits per timestep, and the rate-distortion curve
"""
