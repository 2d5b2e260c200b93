"""What samples/11_eftnas.py is made of: labelled texts, ways to a smaller encoder, and what they are worth."""
