"""Reader study (Visual Turing Test): can a reader tell synthetic from real tumours?

`blinding` makes volumes alike in all but their picture, `store` keeps the answers, `server` shows
the cases in a local web page, `results` makes the table. The command line is in `cli`.
"""
