"""The figures of the reports: objects of their own (no pyplot, no global state) that need no display.

``comparison``   curves of a small comparison
``curves``       curves of a block's arms
``effect_plot``  every arm of a block against its base arm, with intervals
``parts``        where in a network the decay rules
``drawing``      colours, canvas and PNG files of all of them
"""
