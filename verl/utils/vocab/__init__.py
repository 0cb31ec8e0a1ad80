"""The parts of the vocabulary contract; ``verl.utils.vocab_contract`` puts them together."""
