"""Explain the terms of the report pages, each in a sentence."""

VERIFY, OUTPUTS, ANALYZE, INSPECT = "verify", "verify outputs", "analyze", "inspect"

TERMS = (
    ("adapter", "A small file of trained changes to a base: factors, and for DoRA also magnitudes.", {INSPECT}),
    ("LoRA", "W' = W + s·BA: a product of two small factors is added to a weight.", {INSPECT, VERIFY, OUTPUTS}),
    ("DoRA", "W' = m·V/‖V‖ with V = W + s·BA: each row's length is trained apart from its direction.",
     {INSPECT, VERIFY, OUTPUTS}),
    ("rank", "r, the number of rows of A and of columns of B.", {INSPECT}),
    ("scaling", "s, the factor of BA: alpha/r, or alpha/√r for rsLoRA.", {INSPECT}),
    ("magnitude", "m of DoRA: one trained length for each output row.", {INSPECT}),
    ("module", "A layer of the model, named as the model names it.", {INSPECT, VERIFY, ANALYZE}),
    ("loads other weights", "The program reads the files without an error and computes something else.", {INSPECT}),
    ("wrong", "Elements that no correct rounding of the exact result explains.", {VERIFY}),
    ("ulp", "Unit in the last place: the distance from a number to the next one of its dtype.", {VERIFY}),
    ("output error", "The relative error of a module's output against the adapter's own, on random inputs.", {VERIFY}),
    ("rounding alone", "The same figure if every element were rounded correctly: no merge can be better.",
     {VERIFY, OUTPUTS}),
    ("untouched", "A tensor that no adapter changes; its bytes must be the base's.", {VERIFY}),
    ("KL", "The divergence of the two models' probabilities, in nats; 0 if they are equal.", {OUTPUTS}),
    ("top-1", "The likeliest next token, or class.", {OUTPUTS}),
    ("ΔW", "W' − W: the weight after training minus the weight before.", {ANALYZE}),
    ("ΔM", "The mean over the rows of |‖w'‖ − ‖w‖|: how far lengths moved.", {ANALYZE}),
    ("ΔD", "The mean over the rows of 1 − cos(w', w): how far directions turned.", {ANALYZE}),
    ("r", "Pearson's correlation of ΔM and ΔD over layers and steps, between −1 and 1.", {ANALYZE}),
    ("stable rank", "‖ΔW‖²/σ₁²: about how many directions a change uses.", {ANALYZE}),
    ("effective rank", "exp of the entropy of the singular values of ΔW, each divided by their sum.", {ANALYZE}),
    ("lost by rounding", "The share of ΔW that rounding W' into the base's dtype loses.", {ANALYZE}),
)  # fmt: skip
"""Each term with its sentence and the pages that use it."""
