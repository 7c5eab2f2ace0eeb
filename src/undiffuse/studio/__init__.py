"""The studio: a page on this machine where a model's noise becomes data and every knob is live.

labs.py     what the labs compute: trajectories, branches, inversions, strips of scales, walks between noises
plane.py    the 2-D lab: exact and learned fields, trained while one watches
runs.py     what a run folder says, for the curves
app.py      the routes, and who may ask
page/       one static page: HTML, one style sheet, plain ES modules; nothing is loaded from elsewhere
model/      a small model of real digits, with a few of them; `make studio-model` makes it again
"""
