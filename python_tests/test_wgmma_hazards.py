"""tools/wgmma_hazards.py: registers that are touched while products in flight use them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

LOOP = """
.L_x_1:
        /*0000*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
{first}
        /*0010*/                   LOP3.LUT R88, R9, 0xc0c0c0c0, RZ, 0xc0, !PT ;
        /*0020*/                   WARPGROUP.ARRIVE ;
        /*0030*/                   IGMMA.64x128x32.S8.S8 R24, R88, gdesc[UR4], R24, UP0, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
{second}
        /*0060*/                   IGMMA.64x128x32.S8.S8 R24, R92, gdesc[UR4], R24, gsb0 ;
        /*0070*/              @!P2 BRA `(.L_x_1) ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/                   STG.E desc[UR14][R12.64], R24 ;
"""


def tool() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "tools" / "wgmma_hazards.py"
    spec = importlib.util.spec_from_file_location("wgmma_hazards", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hazards(first: str = "", second: str = "") -> list[str]:
    lines = [f"        /*0008*/                   {line} ;" if line else "" for line in (first, second)]
    return list(tool().hazards(LOOP.format(first=lines[0], second=lines[1]).splitlines()))


def test_a_loop_that_waits_is_clean() -> None:
    assert hazards() == []
    assert hazards(second="LDS.128 R92, [R5+UR4]") == []  # behind the wait for the group that read them
    assert hazards(first="LDS.128 R8, [R5+UR4]") == []
    assert hazards(first="STS [R5], R8") == []
    assert hazards(first="BAR.SYNC.DEFER_BLOCKING R92, 0x80") == []  # reads an operand, which is harmless


@pytest.mark.parametrize(
    "instruction",
    [
        "LDS.128 R92, [R5+UR4]",  # operands of the second group, which is still in flight
        "LDS.128 R89, [R5+UR4]",  # its last register is one of them
        "IMAD.WIDE R94, R4, 0x2, R6",
        "@P0 IADD3 R95, R4, 0x1, RZ",
        "IADD3 R24, R24, 0x1, RZ",  # sums
        "IADD3 R4, R87, 0x1, RZ",
        "STG.E desc[UR14][R12.64], R60",
    ],
)
def test_registers_in_flight_are_found(instruction: str) -> None:
    found = hazards(first=instruction)
    assert len(found) == 1 and instruction in found[0]


def test_products_of_fp16_are_products() -> None:
    code = LOOP.format(first="", second="        /*0008*/   LDS.128 R92, [R5+UR4] ;").splitlines()
    late = LOOP.format(first="        /*0008*/   IMAD R94, R4, R5, R6 ;", second="").splitlines()
    for lines, count in ((code, 0), (late, 1)):
        fp16 = [line.replace("IGMMA.64x128x32.S8.S8", "HGMMA.64x128x16.F32") for line in lines]
        assert len(tool().hazards(fp16)) == count


def test_code_without_products() -> None:
    assert hazards() == [] and tool().hazards([]) == []
    loop = [".L_x_1:", "        /*0000*/    LDS.128 R92, [R5] ;", "        /*0010*/    BRA `(.L_x_1) ;"]
    assert tool().hazards(loop) == []
