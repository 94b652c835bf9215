"""Episodes: how a group request becomes completions.

plain replies       single_turn
rollout functions   setup, load → runner (a group) → rollout (`ctx`), state, tape, threads, errors
older shapes        legacy, facades, generation, generate_server
chat templates      chat, messages, data_text, template_check, tool_calls
tools               tool_loop, tool_kinds
agents' endpoint    openai_api, openai_shapes, openai_responses
environments        session (the protocol), lease, play; openenv, openenv_leases, openenv_actions, openenv_wire,
                    openenv_server
"""
