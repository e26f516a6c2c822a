"""The reference column: each family's ops as plain torch expressions, differentiable to any order."""
