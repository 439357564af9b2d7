"""Rows of data to batches of token ids. May import parallel and below.

sources, rows   what `data.train` names, to raw rows that know their place; the report on what was left out
fields          what a row's fields may be; which ones are used, and which cannot be
chats           a row's conversation: messages, tools, the turns to learn
templates       a conversation to its text, by the tokenizer's chat template
formats         a row of each format to its text and the characters to learn
preferences     rows of preferences: which of two completions is better, or whether one is wanted
encode          text to token ids and the mask of tokens to learn
examples        all encoded rows, in flat arrays
packing         several rows in one sequence
batches         global batches, shared out over ranks; the evaluation pass
streaming       the same from a stream too large to hold, prepared by a thread
windows         a stream's rows, of which each rank encodes its share
run_data        all of a run's rows, as its model and its processes need them
"""
