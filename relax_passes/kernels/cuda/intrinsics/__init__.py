"""The instructions that TensorIR has no statement for, as typed objects called from the IR."""
