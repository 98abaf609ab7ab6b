"""micro-llava: the small LLaVA that ships with vtexport, its images and its questions.

`scenes` composes images and questions from data that scikit-learn and scikit-image carry;
`heldout` is the fixed evaluation set made from them. The training script, which is not part of
the installed package, is `engines/micro-llava/train.py`.
"""
