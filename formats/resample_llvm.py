"""The two loops of `formats.resample` in LLVM's assembly, which has vectors of any length.

The instructions that each line becomes depend on the machine, the numbers do not: there are only additions, products,
shifts and comparisons of whole numbers, none of which overflows.

Both loops add up products of pixels and weights in pairs, for which most machines have one instruction, four vectors of
eight sums at once, so that each weight is loaded once for them. In lines that stand four times, `#` is 0 … 3.
"""

from collections.abc import Iterable

VECTORS = 4


def assembly(bits: int, low: int) -> str:
    """A module with the functions `across` and `down`, whose weights have so many bits, the lower part `low` of them.

    across(source, height, width, wide, wide_stride, target, stride, columns, starts, weights, pairs, bias):
        `source`: bytes r g b of `height` × `width` pixels, and 16 more. `wide`: room for 4 × `wide_stride` numbers of
        16 bits. Result: of each two rows a, b and each column, 16 bits each of ra rb ga gb ba bb xa xb; the next two
        are `stride` of these numbers on.
    down(source, stride, target, rows, starts, weights, pairs, bias):
        `source`: what `across` made. Result: bytes r g b x, of `rows` rows and `stride` ÷ 8 columns.

    Result i is made of 2 × `pairs` pixels from `starts[i]` on, an even number; for each two there are four weights of
    16 bits: two upper parts, two lower ones. `bias[i]` are four numbers of 32 bits.
    """
    minmax = "".join(f"declare <8 x i32> @llvm.{name}.v8i32(<8 x i32>, <8 x i32>)\n" for name in ("smin", "smax"))
    return minmax + _WIDEN + _across(bits, low) + _down(bits, low)


def _places(numbers: Iterable[int]) -> str:
    return "<" + ", ".join(f"i32 {number}" for number in numbers) + ">"


def _each(lines: str) -> str:
    return "".join(lines.replace("#", str(i)) for i in range(VECTORS))


def _two_pixels(first: int) -> str:
    """From bytes r g b of two rows: those of two pixels side by side; the fourth pair is not used."""
    one_row = [first + i for i in (0, 3, 1, 4, 2, 5, 2, 5)]
    return _places(one_row + [16 + i for i in one_row])


# Two rows a, b become, for each two pixels, 16 bits each of ra0 ra1 ga0 ga1 ba0 ba1 xa0 xa1 rb0 rb1 ….
_WIDEN = f"""
define internal void @widen(ptr %a, ptr %b, ptr %target, i64 %width) {{
entry:
  br label %loop
loop:
  %x = phi i64 [0, %entry], [%next, %loop]
  %x3 = mul i64 %x, 3
  %ata = getelementptr i8, ptr %a, i64 %x3
  %atb = getelementptr i8, ptr %b, i64 %x3
  %bytesa = load <16 x i8>, ptr %ata, align 1
  %bytesb = load <16 x i8>, ptr %atb, align 1
  %left = shufflevector <16 x i8> %bytesa, <16 x i8> %bytesb, <16 x i32> {_two_pixels(0)}
  %right = shufflevector <16 x i8> %bytesa, <16 x i8> %bytesb, <16 x i32> {_two_pixels(6)}
  %wideleft = zext <16 x i8> %left to <16 x i16>
  %wideright = zext <16 x i8> %right to <16 x i16>
  %x8 = mul i64 %x, 8
  %to = getelementptr i16, ptr %target, i64 %x8
  store <16 x i16> %wideleft, ptr %to, align 2
  %toright = getelementptr i16, ptr %to, i64 16
  store <16 x i16> %wideright, ptr %toright, align 2
  %next = add i64 %x, 4
  %more = icmp slt i64 %next, %width
  br i1 %more, label %loop, label %end
end:
  ret void
}}
"""


def _apart(name: str) -> str:
    """The even and the odd ones of 16 numbers, as 32 bits."""
    return "".join(
        f"""
  %{name}.{which}16 = shufflevector <16 x i16> %{name}, <16 x i16> poison, <8 x i32> {_places(range(first, 16, 2))}
  %{name}.{which} = sext <8 x i16> %{name}.{which}16 to <8 x i32>"""
        for which, first in (("even", 0), ("odd", 1))
    )


def _weights(part: str, offset: int) -> str:
    """Two weights, for all lanes."""
    return f"""
  %{part}at = getelementptr i32, ptr %two, i64 {offset}
  %{part}two = load i32, ptr %{part}at, align 4
  %{part}one = insertelement <8 x i32> poison, i32 %{part}two, i64 0
  %{part}all = shufflevector <8 x i32> %{part}one, <8 x i32> poison, <8 x i32> zeroinitializer
  %{part} = bitcast <8 x i32> %{part}all to <16 x i16>{_apart(part)}"""


def _add_products(part: str) -> str:
    return f"""
  %{part}even# = mul nsw <8 x i32> %pixels#.even, %{part}.even
  %{part}odd# = mul nsw <8 x i32> %pixels#.odd, %{part}.odd
  %{part}pair# = add nsw <8 x i32> %{part}even#, %{part}odd#
  %{part}next# = add <8 x i32> %{part}sum#, %{part}pair#"""


def _sum_up(before: str, bits: int, low: int) -> str:
    """Four vectors of results, %value0 … %value3, from pixels at %first0 … %first3 and then every %step numbers.

    Begins where the block `before` jumps to %tap, and ends in the block %summed. Needs %mine and %pairs, and %extra.
    """
    sums = f"""
  %uppersum# = phi <8 x i32> [zeroinitializer, %{before}], [%uppernext#, %tap]
  %lowersum# = phi <8 x i32> [zeroinitializer, %{before}], [%lowernext#, %tap]"""
    pixels = """
  %from# = getelementptr i16, ptr %first#, i64 %offset
  %pixels# = load <16 x i16>, ptr %from#, align 2"""
    finish = f"""
  %shifted# = shl <8 x i32> %uppernext#, {_places([low] * 8)}
  %both# = add <8 x i32> %shifted#, %lowernext#
  %sum# = add <8 x i32> %both#, %extra
  %whole# = ashr <8 x i32> %sum#, {_places([bits] * 8)}
  %floor# = call <8 x i32> @llvm.smax.v8i32(<8 x i32> %whole#, <8 x i32> zeroinitializer)
  %value# = call <8 x i32> @llvm.smin.v8i32(<8 x i32> %floor#, <8 x i32> {_places([255] * 8)})"""
    return f"""
tap:
  %t = phi i64 [0, %{before}], [%t1, %tap]{_each(sums)}
  %t2 = mul i64 %t, 2
  %two = getelementptr i32, ptr %mine, i64 %t2{_weights("upper", 0)}{_weights("lower", 1)}
  %offset = mul i64 %t, %step{_each(pixels + _apart("pixels#") + _add_products("upper") + _add_products("lower"))}
  %t1 = add i64 %t, 1
  %moretaps = icmp slt i64 %t1, %pairs
  br i1 %moretaps, label %tap, label %summed
summed:{_each(finish)}"""


def _of_result(i: str) -> str:
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
  %extra = shufflevector <4 x i32> %bias4, <4 x i32> poison, <8 x i32> {_places([0, 1, 2, 3] * 2)}"""


def _across(bits: int, low: int) -> str:
    """Filters along rows: four times two of them are widened, then each column is summed up for all of them.

    The last eight may begin in the eight before, and the last row may be its own neighbour, so that each is whole.
    """
    widen = """
  %pair# = add i64 %block, #
  %a# = mul i64 %pair#, 2
  %next# = add i64 %a#, 1
  %beyond# = icmp sge i64 %next#, %height
  %b# = select i1 %beyond#, i64 %a#, i64 %next#
  %bytesa# = mul i64 %a#, %bytes
  %bytesb# = mul i64 %b#, %bytes
  %rowa# = getelementptr i8, ptr %source, i64 %bytesa#
  %rowb# = getelementptr i8, ptr %source, i64 %bytesb#
  %widebefore# = mul i64 %wide_stride, #
  %wide# = getelementptr i16, ptr %wide, i64 %widebefore#
  call void @widen(ptr %rowa#, ptr %rowb#, ptr %wide#, i64 %width)
  %before# = mul i64 %pair#, %stride
  %target# = getelementptr i16, ptr %target, i64 %before#"""
    first = """
  %first# = getelementptr i16, ptr %wide#, i64 %start8"""
    store = f"""
  %mixed# = shufflevector <8 x i32> %value#, <8 x i32> poison, <8 x i32> {_places([0, 4, 1, 5, 2, 6, 3, 7])}
  %short# = trunc <8 x i32> %mixed# to <8 x i16>
  %to# = getelementptr i16, ptr %target#, i64 %x8
  store <8 x i16> %short#, ptr %to#, align 2"""
    return f"""
define void @across(ptr %source, i64 %height, i64 %width, ptr %wide, i64 %wide_stride, ptr %target, i64 %stride,
                    i64 %columns, ptr %starts, ptr %weights, i64 %pairs, ptr %bias) {{
entry:
  %bytes = mul i64 %width, 3
  %height1 = add i64 %height, 1
  %rowpairs = lshr i64 %height1, 1
  %last = sub i64 %rowpairs, {VECTORS}
  %step = add i64 16, 0
  br label %eight
eight:
  %begin = phi i64 [0, %entry], [%begin1, %eightdone]
  %late = icmp sgt i64 %begin, %last
  %block = select i1 %late, i64 %last, i64 %begin{_each(widen)}
  br label %column
column:
  %x = phi i64 [0, %eight], [%x1, %summed]{_of_result("x")}
  %start8 = mul i64 %start, 8{_each(first)}
  br label %tap{_sum_up("column", bits, low)}
  %x8 = mul i64 %x, 8{_each(store)}
  %x1 = add i64 %x, 1
  %morecolumns = icmp slt i64 %x1, %columns
  br i1 %morecolumns, label %column, label %eightdone
eightdone:
  %begin1 = add i64 %begin, {VECTORS}
  %more = icmp slt i64 %begin1, %rowpairs
  br i1 %more, label %eight, label %end
end:
  ret void
}}
"""


def _down(bits: int, low: int) -> str:
    """Filters along columns: eight pixels of a row are summed up at once."""
    first = """
  %right# = add i64 %x8, #
  %skip# = mul i64 %right#, 16
  %first# = getelementptr i16, ptr %top, i64 %skip#"""
    store = """
  %byte# = trunc <8 x i32> %value# to <8 x i8>
  %done# = mul i64 %right#, 8
  %to# = getelementptr i8, ptr %out, i64 %done#
  store <8 x i8> %byte#, ptr %to#, align 1"""
    return f"""
define void @down(ptr %source, i64 %stride, ptr %target, i64 %rows, ptr %starts, ptr %weights, i64 %pairs, ptr %bias) {{
entry:
  %step = add i64 %stride, 0
  %eights = sdiv i64 %stride, {16 * VECTORS}
  %bytes = sdiv i64 %stride, 2
  br label %row
row:
  %y = phi i64 [0, %entry], [%y1, %rowdone]{_of_result("y")}
  %startpair = sdiv i64 %start, 2
  %before = mul i64 %startpair, %stride
  %top = getelementptr i16, ptr %source, i64 %before
  %donerows = mul i64 %y, %bytes
  %out = getelementptr i8, ptr %target, i64 %donerows
  br label %pixel
pixel:
  %x = phi i64 [0, %row], [%x1, %summed]
  %x8 = mul i64 %x, {VECTORS}{_each(first)}
  br label %tap{_sum_up("pixel", bits, low)}{_each(store)}
  %x1 = add i64 %x, 1
  %morepixels = icmp slt i64 %x1, %eights
  br i1 %morepixels, label %pixel, label %rowdone
rowdone:
  %y1 = add i64 %y, 1
  %morerows = icmp slt i64 %y1, %rows
  br i1 %morerows, label %row, label %end
end:
  ret void
}}
"""
