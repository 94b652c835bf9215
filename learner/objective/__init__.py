"""What is optimised: advantages, the policy loss, and what it measures of itself."""
