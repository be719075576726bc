"""Report: what a run did, as one HTML file that needs no network and no server, and the reveal viewer."""
