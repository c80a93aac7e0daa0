"""Which module of a net made a node of a graph, and which nodes cannot be differentiated twice."""
