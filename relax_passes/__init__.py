"""The compiler: Relax passes from ordinary linears to scheduled TensorIR for quantized products."""
