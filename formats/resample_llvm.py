"""The two loops of `formats.resample` in LLVM's assembly, which has vectors of any length.

The instructions that each line becomes depend on the machine, the numbers do not: there are only additions, products,
shifts and comparisons of whole numbers, none of which overflows.

Both loops add up products of pixels and weights in pairs, for which most machines have one instruction, four vectors of
sums at once, so that each weight is loaded once for them. In lines that stand four times, `#` is 0 … 3. LANES is how
many sums a vector has, four for each pixel (r g b x), and TWICE how many numbers they are made of.
"""

from collections.abc import Iterable

VECTORS = 4
COLUMNS = 16  # that `across` makes of what it widens at once, so that this stays in the fastest cache


def assembly(bits: int, low: int, lanes: int) -> str:
    """A module with the functions `across` and `down`, whose weights have so many bits, the lower part `low` of them.

    across(source, height, width, wide, wide_stride, target, stride, columns, starts, weights, pairs, bias):
        `source`: bytes r g b of `height` × `width` pixels, and 16 more. `wide`: room for 4 × `wide_stride` numbers of
        16 bits, `lanes` for each pixel that 16 columns are made of and for 4 more. Result: of each two rows a, b and
        each column, 16 bits each of ra rb ga gb ba bb xa xb; the next two are `stride` of these numbers on. It has as
        many rows as whole vectors hold.
    down(source, stride, target, rows, starts, weights, pairs, bias):
        `source`: what `across` made. Result: bytes r g b x, of `rows` rows and `stride` ÷ 8 columns.

    Result i is made of 2 × `pairs` pixels from `starts[i]` on, an even number; for each two there are four weights of
    16 bits: two upper parts, two lower ones. `bias[i]` are four numbers of 32 bits.

    Args:
        bits: of a weight.
        low: of its lower part.
        lanes: 8 or 16. The pictures are the same; machines with vectors of 512 bits make them faster with 16.
    """
    module = _DECLARED + _widen(lanes) + _across(bits, low, lanes) + _down(bits, low, lanes)
    return module.replace("LANES", str(lanes)).replace("TWICE", str(2 * lanes))


_DECLARED = """
declare <LANES x i32> @llvm.smin.vLANESi32(<LANES x i32>, <LANES x i32>)
declare <LANES x i32> @llvm.smax.vLANESi32(<LANES x i32>, <LANES x i32>)
declare i64 @llvm.smin.i64(i64, i64)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
"""


def _places(numbers: Iterable[int]) -> str:
    """Which elements a shuffle takes."""
    listed = [f"i32 {number}" for number in numbers]
    return f"<{len(listed)} x i32> <{', '.join(listed)}>"


def _each(lines: str, count: int = VECTORS) -> str:
    return "".join(lines.replace("#", str(i)) for i in range(count))


def _two_pixels(first: int, lanes: int) -> str:
    """From rows of 16 bytes, one after another: two pixels of each, as pairs of 16 bits; the fourth pair is zeros."""
    zero = 4 * lanes
    order = [place for pair in ((0, 3), (1, 4), (2, 5)) for i in pair for place in (first + i, zero)] + [zero] * 4
    return _places(place if place == zero else 16 * row + place for row in range(lanes // 4) for place in order)


def _widen(lanes: int) -> str:
    """Pixels %begin … %end of rows a, b, … become, for each two, 16 bits each of ra0 ra1 ga0 ga1 ba0 ba1 xa0 xa1 rb0 ….

    Rows beyond the last are taken to be like it.
    """
    rows = lanes // 4
    find = """
  %number# = add i64 %first, #
  %there# = icmp slt i64 %number#, %last
  %real# = select i1 %there#, i64 %number#, i64 %last
  %skip# = mul i64 %real#, %rowbytes
  %row# = getelementptr i8, ptr %source, i64 %skip#"""
    load = """
  %at# = getelementptr i8, ptr %row#, i64 %x3
  %bytes# = load <16 x i8>, ptr %at#, align 1"""
    return f"""
define internal void @widen(ptr %source, i64 %width, i64 %last, i64 %first, i64 %begin, i64 %end, ptr %target) {{
entry:
  %rowbytes = mul i64 %width, 3{_each(find, rows)}
  br label %loop
loop:
  %x = phi i64 [%begin, %entry], [%next, %loop]
  %x3 = mul i64 %x, 3{_each(load, rows)}{_join(rows)}
  %left = shufflevector <{16 * rows} x i8> %all, <{16 * rows} x i8> zeroinitializer, {_two_pixels(0, lanes)}
  %right = shufflevector <{16 * rows} x i8> %all, <{16 * rows} x i8> zeroinitializer, {_two_pixels(6, lanes)}
  %done = sub i64 %x, %begin
  %before = mul i64 %done, LANES
  %to = getelementptr i16, ptr %target, i64 %before
  store <{16 * rows} x i8> %left, ptr %to, align 2
  %toright = getelementptr i16, ptr %to, i64 TWICE
  store <{16 * rows} x i8> %right, ptr %toright, align 2
  %next = add i64 %x, 4
  %more = icmp slt i64 %next, %end
  br i1 %more, label %loop, label %finished
finished:
  ret void
}}
"""


def _join(rows: int) -> str:
    """%bytes0, %bytes1, … one after another: %all."""
    if rows == 2:
        return f"""
  %all = shufflevector <16 x i8> %bytes0, <16 x i8> %bytes1, {_places(range(32))}"""
    return f"""
  %upper = shufflevector <16 x i8> %bytes0, <16 x i8> %bytes1, {_places(range(32))}
  %lower = shufflevector <16 x i8> %bytes2, <16 x i8> %bytes3, {_places(range(32))}
  %all = shufflevector <32 x i8> %upper, <32 x i8> %lower, {_places(range(64))}"""


def _apart(name: str, lanes: int) -> str:
    """The even and the odd ones of numbers of 16 bits, as 32 bits."""
    return "".join(
        f"""
  %{name}.{which}16 = shufflevector <TWICE x i16> %{name}, <TWICE x i16> poison, {places}
  %{name}.{which} = sext <LANES x i16> %{name}.{which}16 to <LANES x i32>"""
        for which, places in (("even", _places(range(0, 2 * lanes, 2))), ("odd", _places(range(1, 2 * lanes, 2))))
    )


def _weights(part: str, offset: int, lanes: int) -> str:
    """Two weights, for all lanes."""
    return f"""
  %{part}at = getelementptr i32, ptr %two, i64 {offset}
  %{part}two = load i32, ptr %{part}at, align 4
  %{part}one = insertelement <LANES x i32> poison, i32 %{part}two, i64 0
  %{part}all = shufflevector <LANES x i32> %{part}one, <LANES x i32> poison, <LANES x i32> zeroinitializer
  %{part} = bitcast <LANES x i32> %{part}all to <TWICE x i16>{_apart(part, lanes)}"""


def _add_products(part: str) -> str:
    return f"""
  %{part}even# = mul nsw <LANES x i32> %pixels#.even, %{part}.even
  %{part}odd# = mul nsw <LANES x i32> %pixels#.odd, %{part}.odd
  %{part}pair# = add nsw <LANES x i32> %{part}even#, %{part}odd#
  %{part}next# = add <LANES x i32> %{part}sum#, %{part}pair#"""


def _sum_up(before: str, bits: int, low: int, lanes: int) -> str:
    """Four vectors of results, %value0 … %value3, from pixels at %first0 … %first3 and then every %step numbers.

    Begins where the block `before` jumps to %tap, and ends in the block %summed. Needs %mine and %pairs, and %extra.
    """
    sums = f"""
  %uppersum# = phi <LANES x i32> [zeroinitializer, %{before}], [%uppernext#, %tap]
  %lowersum# = phi <LANES x i32> [zeroinitializer, %{before}], [%lowernext#, %tap]"""
    pixels = """
  %from# = getelementptr i16, ptr %first#, i64 %offset
  %pixels# = load <TWICE x i16>, ptr %from#, align 2"""
    products = _apart("pixels#", lanes) + _add_products("upper") + _add_products("lower")
    finish = f"""
  %shifted# = shl <LANES x i32> %uppernext#, splat (i32 {low})
  %both# = add <LANES x i32> %shifted#, %lowernext#
  %sum# = add <LANES x i32> %both#, %extra
  %whole# = ashr <LANES x i32> %sum#, splat (i32 {bits})
  %floor# = call <LANES x i32> @llvm.smax.vLANESi32(<LANES x i32> %whole#, <LANES x i32> zeroinitializer)
  %value# = call <LANES x i32> @llvm.smin.vLANESi32(<LANES x i32> %floor#, <LANES x i32> splat (i32 255))"""
    return f"""
tap:
  %t = phi i64 [0, %{before}], [%t1, %tap]{_each(sums)}
  %t2 = mul i64 %t, 2
  %two = getelementptr i32, ptr %mine, i64 %t2{_weights("upper", 0, lanes)}{_weights("lower", 1, lanes)}
  %offset = mul i64 %t, %step{_each(pixels + products)}
  %t1 = add i64 %t, 1
  %moretaps = icmp slt i64 %t1, %pairs
  br i1 %moretaps, label %tap, label %summed
summed:{_each(finish)}"""


def _of_result(i: str, lanes: int) -> str:
    """What belongs to result %i: %start, %mine (its weights) and %extra."""
    return f"""
  %startat = getelementptr i64, ptr %starts, i64 %{i}
  %start = load i64, ptr %startat
  %weightspairs = mul i64 %{i}, %pairs
  %weightsbefore = mul i64 %weightspairs, 2
  %mine = getelementptr i32, ptr %weights, i64 %weightsbefore
  %biasbefore = mul i64 %{i}, 4
  %biasat = getelementptr i32, ptr %bias, i64 %biasbefore
  %bias4 = load <4 x i32>, ptr %biasat, align 4
  %extra = shufflevector <4 x i32> %bias4, <4 x i32> poison, {_places([0, 1, 2, 3] * (lanes // 4))}"""


def _across(bits: int, low: int, lanes: int) -> str:
    """Filters along rows: what four vectors hold of them is widened, then each column is summed up for all of them.

    The last four vectors may begin in the four before, so that all are whole. The rows after them are fetched
    meanwhile: their order is not one that processors foresee.
    """
    rows = lanes // 4
    widen = f"""
  %vector# = add i64 %block, #
  %row# = mul i64 %vector#, {rows}
  %widebefore# = mul i64 %wide_stride, #
  %wide# = getelementptr i16, ptr %wide, i64 %widebefore#
  call void @widen(ptr %source, i64 %width, i64 %bottom, i64 %row#, i64 %left, i64 %right, ptr %wide#)
  %pair# = mul i64 %vector#, {rows // 2}
  %before# = mul i64 %pair#, %stride
  %target# = getelementptr i16, ptr %target, i64 %before#"""
    first = """
  %first# = getelementptr i16, ptr %wide#, i64 %skip"""
    store = """
  %short# = trunc <LANES x i32> %value# to <LANES x i16>"""
    for pair in range(rows // 2):
        two_rows = _places(8 * pair + place for place in (0, 4, 1, 5, 2, 6, 3, 7))
        store += f"""
  %mixed{pair}# = shufflevector <LANES x i16> %short#, <LANES x i16> poison, {two_rows}
  %down{pair}# = mul i64 %stride, {pair}
  %place{pair}# = add i64 %down{pair}#, %x8
  %to{pair}# = getelementptr i16, ptr %target#, i64 %place{pair}#
  store <8 x i16> %mixed{pair}#, ptr %to{pair}#, align 2"""
    fetch = "".join(
        f"""
  %line{i} = getelementptr i8, ptr %share, i64 {64 * i}
  call void @llvm.prefetch.p0(ptr %line{i}, i32 0, i32 2, i32 1)"""
        for i in range(3 * rows // 2)  # all of them if the picture is up to 2,700 pixels wide
    )
    return f"""
define void @across(ptr %source, i64 %height, i64 %width, ptr %wide, i64 %wide_stride, ptr %target, i64 %stride,
                    i64 %columns, ptr %starts, ptr %weights, i64 %pairs, ptr %bias) {{
entry:
  %bottom = sub i64 %height, 1
  %rounded = add i64 %height, {rows - 1}
  %vectors = udiv i64 %rounded, {rows}
  %last = sub i64 %vectors, {VECTORS}
  %step = add i64 TWICE, 0
  %rowbytes = mul i64 %width, 3
  %fourbytes = mul i64 %rowbytes, {rows * VECTORS}
  %columnbytes = udiv i64 %fourbytes, %columns
  %pixels = mul i64 %pairs, 2
  br label %four
four:
  %begin = phi i64 [0, %entry], [%begin1, %fourdone]
  %late = icmp sgt i64 %begin, %last
  %block = select i1 %late, i64 %last, i64 %begin
  %nextblock = add i64 %block, {VECTORS}
  %nextrow = mul i64 %nextblock, {rows}
  %nextat = mul i64 %nextrow, %rowbytes
  %nextfour = getelementptr i8, ptr %source, i64 %nextat
  br label %some
some:
  %from = phi i64 [0, %four], [%to, %somedone]
  %beyond = add i64 %from, {COLUMNS}
  %to = call i64 @llvm.smin.i64(i64 %beyond, i64 %columns)
  %leftat = getelementptr i64, ptr %starts, i64 %from
  %left = load i64, ptr %leftat
  %until = sub i64 %to, 1
  %lastat = getelementptr i64, ptr %starts, i64 %until
  %laststart = load i64, ptr %lastat
  %lastend = add i64 %laststart, %pixels
  %right = call i64 @llvm.smin.i64(i64 %lastend, i64 %width){_each(widen)}
  br label %column
column:
  %x = phi i64 [%from, %some], [%x1, %summed]{_of_result("x", lanes)}
  %sharebefore = mul i64 %x, %columnbytes
  %share = getelementptr i8, ptr %nextfour, i64 %sharebefore{fetch}
  %within = sub i64 %start, %left
  %skip = mul i64 %within, LANES{_each(first)}
  br label %tap{_sum_up("column", bits, low, lanes)}
  %x8 = mul i64 %x, 8{_each(store)}
  %x1 = add i64 %x, 1
  %morecolumns = icmp slt i64 %x1, %to
  br i1 %morecolumns, label %column, label %somedone
somedone:
  %moresome = icmp slt i64 %to, %columns
  br i1 %moresome, label %some, label %fourdone
fourdone:
  %begin1 = add i64 %begin, {VECTORS}
  %more = icmp slt i64 %begin1, %vectors
  br i1 %more, label %four, label %end
end:
  ret void
}}
"""


def _down(bits: int, low: int, lanes: int) -> str:
    """Filters along columns: what four vectors hold of a row is summed up at once."""
    first = """
  %right# = add i64 %x4, #
  %skip# = mul i64 %right#, TWICE
  %first# = getelementptr i16, ptr %top, i64 %skip#"""
    store = """
  %byte# = trunc <LANES x i32> %value# to <LANES x i8>
  %done# = mul i64 %right#, LANES
  %to# = getelementptr i8, ptr %out, i64 %done#
  store <LANES x i8> %byte#, ptr %to#, align 1"""
    return f"""
define void @down(ptr %source, i64 %stride, ptr %target, i64 %rows, ptr %starts, ptr %weights, i64 %pairs, ptr %bias) {{
entry:
  %step = add i64 %stride, 0
  %fours = udiv i64 %stride, {2 * lanes * VECTORS}
  %bytes = udiv i64 %stride, 2
  br label %row
row:
  %y = phi i64 [0, %entry], [%y1, %rowdone]{_of_result("y", lanes)}
  %startpair = udiv i64 %start, 2
  %before = mul i64 %startpair, %stride
  %top = getelementptr i16, ptr %source, i64 %before
  %donerows = mul i64 %y, %bytes
  %out = getelementptr i8, ptr %target, i64 %donerows
  br label %four
four:
  %x = phi i64 [0, %row], [%x1, %summed]
  %x4 = mul i64 %x, {VECTORS}{_each(first)}
  br label %tap{_sum_up("four", bits, low, lanes)}{_each(store)}
  %x1 = add i64 %x, 1
  %morefours = icmp slt i64 %x1, %fours
  br i1 %morefours, label %four, label %rowdone
rowdone:
  %y1 = add i64 %y, 1
  %morerows = icmp slt i64 %y1, %rows
  br i1 %morerows, label %row, label %end
end:
  ret void
}}
"""
