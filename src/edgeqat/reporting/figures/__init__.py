"""The figures of a report, each drawn by matplotlib as SVG that takes the colour of the text around it."""
