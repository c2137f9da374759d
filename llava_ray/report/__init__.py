"""Reports: pieces (tables, charts, image grids, token text) rendered into one self-contained HTML file.

``pieces`` are the values a report is made of, ``charts`` draws plots, ``rendering`` writes the page. No ray, no torch.
"""
