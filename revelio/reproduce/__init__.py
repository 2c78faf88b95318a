"""The paper's tables and figures as data: what each is made of, what it reported, and what it claims of it.

paper_experiments.csv  every number of the tables of "Revelio: Interpreting and leveraging semantic
                       information in diffusion models" (Kim, Thomas, Ghadiyaram, 2024), as printed
row.py                 one number of the paper
items.py               an item: rows, orderings, title         orderings.py  are they what we measure?
rows.py                a row as this run has it: our model, our pictures, our sizes, or what is missing
page.py                results -> Markdown
"""
