"""Reader study (Visual Turing Test): can a reader tell synthetic from real tumours?

`blinding` removes all differences between files but their voxels, `store` keeps the answers,
`server` shows the cases in a local web page, `results` computes the table. The command line is
`tumorsynth.commands.reader_study`.
"""
