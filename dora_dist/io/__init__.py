"""Files: those that outlast a crash, the headers of those that others wrote, and what identifies their content.

Knows the user's errors, and no model. May import the modules beside this folder: config, schema, errors, device.

durable         directories and files that are there whole or not at all
headers         safetensors, JSON and links of others, checked before they are believed
fingerprint     what tells one base, tokenizer or data set from another
"""
