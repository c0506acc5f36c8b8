"""Ranks that meet under contradictory variables; loaded by path in each rank."""

import os
import socket
from datetime import timedelta

from megatron_mer.errors import LaunchError


def meet_as_told(scenarios):
    """What each scenario gives this rank: nothing, or the error.

    Args:
        scenarios: of each the variables by rank, the port, what is wrong with rank 1, and whether
            a foreign program has the port.
    """
    from megatron_mer.engine.meeting import meet

    rank, said = int(os.environ["RANK"]), []
    stores = []  # A store ends with its last reference, and rank 0's is the server.
    for scenario in scenarios:
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_PORT=str(scenario["port"]))
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ.update(scenario.get("environ", {}).get(str(rank), {}))
        problem = scenario.get("problem") if rank == 1 else None
        limit = timedelta(seconds=scenario.get("limit", 20))
        foreign = socket.socket()
        if scenario.get("foreign"):
            if rank == 1:  # Nobody is there to be met.
                said.append("")
                continue
            foreign.bind(("127.0.0.1", scenario["port"]))
            foreign.listen()
        if rank == 1 and scenario.get("absent"):
            said.append("")
            continue
        try:
            stores.append(meet(limit, problem))
            said.append("")
        except LaunchError as error:
            said.append(str(error))
        foreign.close()
    return said
