"""Names of columns and files by which their meaning is guessed."""

from __future__ import annotations

import re
from collections.abc import Iterable

_USERS = (
    "user customer visitor member account client reviewer person buyer shopper player listener reader viewer student "
    "subscriber consumer participant respondent u visitorid userid author session"
)
_USERS_BY_ID = "subject patient"
"""Words that stand for users with a word such as `id` behind them alone."""
_ITEMS = (
    "item product movie film article book song track artist asin parent_asin sku isbn business restaurant hotel "
    "place venue poi location news video doc document page url game app course job ad post offer goods good content anime i itemid "
    "merchant show stream channel stock"
)
_QUERIES = "query search search_query search_term keyword keywords query_text search_text q"
_TIMES = "time timestamp ts date datetime day at when unix_review_time review_time moment dt"
_DURATIONS = (
    "watch watching play playing dwell read reading view viewing listen listening stay total spent since elapsed session avg average "
    "mean max min median response wait waiting load loading travel duration"
)
_OTHER_TIMES = (
    "delivery delivered return returned ship shipped shipping shipment due expiry expires expired expiration end ended signup registered registration birth "
    "birthday born joined updated update modified loaded ingested ingestion imported release released last first"
)
_LABELS = "rating ratings stars star score label like liked likes click clicked target outcome overall feedback vote y is_click"
_WEIGHTS = "weight weights"
_EVENTS = (
    "event event_type type action action_type behavior behaviour behavior_type behaviour_type interaction_type activity"
)
_PLACES = "position pos place rank step seq sequence index idx turn slot"
_TITLES = "title name label"
_CODES = (
    "category categories cat subcategory cate brand genre type kind class group cluster topic theme tag style colour color material department dept section "
    "segment aisle shelf city town region district province state country county zone seller vendor shop store supplier maker manufacturer "
    "publisher artist author director creator actor composer provider source franchise language template parent model"
)
_CODE = re.compile(r".*_(id|ids|key|code|cd|uuid|hash)")
_QUANTITIES = (
    "num n count counts number distance km miles m rank score views clicks sales sold units population followers likes reviews pages age price of to by "
    "per in from since avg mean max min total"
)
_CHANGES = "last latest updated update modified modification changed seen visited reviewed sold loaded ingested ingestion imported sync synced"
_MEASURES = (
    "year years yr age price prices cost fee salary income wage budget revenue discount percent percentage duration length minutes seconds hours days "
    "months runtime size width height depth weight sqft capacity floors rooms bedrooms bathrooms seats pages words episodes calories experience "
    "distance km miles rating ratings score stars votes count views clicks sales likes followers reviews population mileage horsepower temperature"
)
_ORDERS = (
    "order invoice receipt basket cart transaction trx tx bill voucher ticket slip checkout sale delivery shipment"
)
_AMOUNTS = "amount amt total sum value quantity qty units pieces count counts frequency freq points goals"
_COUNTS = "plays play_count playcount listens listen_count playtime play_time hours minutes seconds duration dwell dwell_time watch_time times"
_EDGES = (
    ("source", "target"), ("src", "dst"), ("from", "to"), ("head", "tail"), ("subject", "object"), ("sender", "receiver"), ("sender", "recipient"),
    ("follower", "followee"), ("citing", "cited"),
)  # fmt: skip
_END = re.compile(r"_(ref|node|name|label)$")
_IDENTIFIER = re.compile(r"(.*?)(?:_?(?:id|ids|key|no|nr|number|code|uuid|idx|index|hash))+")

_OF_OPTION = {"user_id": _USERS, "item_id": _ITEMS, "time": _TIMES, "label": _LABELS, "event": _EVENTS}
_OUTCOMES = (
    "bought purchase purchased converted conversion watched finished completed installed ordered played accepted booked "
    "applied subscribed saved followed success result response reaction sentiment opinion verdict"
)
_IMPRESSIONS = "impression impressions show shown expose exposure display displayed"
_UNDOINGS = (
    "remove removed delete deleted unlike return returned refund refunded cancel canceled cancelled cancellation unsubscribe unsubscribed "
    "unfollow unfollowed unfavorite unfavourite uninstall"
)
_REFUSALS = (
    "dislike disliked hate hated skip skipped hide hidden reject rejected thumbs_down downvote report reported block blocked mute muted "
    "dismiss dismissed decline declined not_interested complaint "
) + _UNDOINGS
_NOT = ("not", "no", "non", "never")
_CHOICES = (
    "view views click clicks pv buy purchase transaction order checkout cart addtocart add_to_cart fav favorite favourite "
    "like love upvote thumbs_up play watch listen read open visit detail share save bookmark wishlist comment review rate "
    "follow subscribe download install book apply search"
)

FILES = {
    "users": "users user customers customer members member visitors clients accounts people persons readers viewers queries",
    "items": "items item products product movies movie films film articles article books book songs tracks artists "
    "businesses places venues news videos documents docs games apps courses jobs ads meta catalogue catalog",
    "interactions": "interactions interaction ratings rating clicks click events event log logs actions orders order "
    "purchases transactions views plays reviews likes sessions behaviors behaviours history data train inter pairs sales",
}
"""Role of a table by the name of its file."""
PARTS = {"train": "train training", "validation": "validation valid val dev", "test": "test testing"}
"""Part of the interactions by the name of its file."""


_CHINESE = {
    "用户": "user", "会员": "member", "客户": "customer", "顾客": "customer", "买家": "buyer", "读者": "reader", "学生": "student",
    "商品": "item", "物品": "item", "产品": "product", "电影": "movie", "影片": "movie", "歌曲": "song", "音乐": "track",
    "文章": "article", "图书": "book", "书籍": "book", "视频": "video", "新闻": "news", "店铺": "merchant", "商家": "business",
    "编号": "id", "标识": "id", "编码": "code", "时间戳": "timestamp", "时间": "time", "日期": "date", "评分": "rating",
    "打分": "score", "分数": "score", "权重": "weight", "行为类型": "event_type", "行为": "behavior", "事件": "event", "搜索词": "query",
    "查询词": "query", "关键词": "keyword", "标题": "title", "片名": "title", "书名": "title", "名称": "name", "点击": "click",
    "交互": "interaction", "日志": "log", "订单": "order", "购买": "purchase", "浏览": "view", "播放": "play", "收藏": "favorite",
    "品牌": "brand", "类目": "category", "类别": "category", "分类": "category", "品类": "category", "城市": "city", "省份": "province",
    "地区": "region", "颜色": "colour", "卖家": "seller", "厂商": "manufacturer", "导演": "director", "年龄": "age", "性别": "gender", "等级": "level", "级别": "level", "价格": "price", "单价": "price", "昵称": "nickname", "标签": "tags",
    "年份": "year", "出生年": "birth_year", "页数": "pages", "薪资": "salary", "工资": "salary",
    "学历": "education", "数量": "quantity", "次数": "count", "时长": "duration", "状态": "state", "账号": "account_id", "号": "no",
    "加购": "cart", "喜欢": "like", "记录": "log", "训练集": "train", "训练": "train", "验证集": "validation", "验证": "validation", "测试集": "test", "测试": "test", "名": "name",
}  # fmt: skip
"""Chinese words that stand for English ones in names, the longer before those that they begin with."""


def plain(name: str) -> str:
    """Return a column's name in lower case with underscores between words: `userId`, `user_id:token` and `用户ID` are `user_id`. Words of
    other letters that are not known are left out: `用户信息`, information on users, is `user`."""
    name = name.partition(":")[0].strip()
    for word, english in _CHINESE.items():
        name = name.replace(word, f" {english} ")
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return re.sub(r"[^0-9a-z]+", "_", words.lower()).strip("_")


def _among(name: str, words: str, last_too: bool = True) -> bool:
    known, found = words.split(), plain(name)
    return found in known or (last_too and found.rpartition("_")[2] in known)


def _names_id(name: str, words: str) -> bool:
    found = plain(name)
    stem = m[1] if (m := _IDENTIFIER.fullmatch(found)) else found
    return (
        stem in words.split() or found in words.split() or (m is not None and stem.rpartition("_")[2] in words.split())
    )


def names_user(name: str) -> bool:
    """Return True for a name of the ids of users: user_id, customer, reviewerID, subject_id."""
    m = _IDENTIFIER.fullmatch(plain(name))
    return _names_id(name, _USERS) or (m is not None and m[1] in _USERS_BY_ID.split())


def is_id(name: str) -> bool:
    """Return True for a name that says that its column holds ids, and not of what."""
    return plain(name) in ("id", "ids", "pid", "uuid", "guid")


def names_visit(name: str) -> bool:
    """Return True for a name of sessions, visits or orders, or of their numbers."""
    return _names_id(name, "session visit " + _ORDERS)


def names_item(name: str) -> bool:
    """Return True for a name of the ids of items: item_id, movieId, asin."""
    return _names_id(name, _ITEMS) and not _tells_post_code(name)


def rank(name: str, option: str) -> tuple[bool, int]:
    """Return the place of a name of a column among those of its meaning, `option` of the schema: one that is known as a whole
    stands before one whose last word is known, and `user_id` before `session_id`."""
    words = _OF_OPTION[option].split()
    found = plain(name)
    stem = m[1] if option in ("user_id", "item_id") and (m := _IDENTIFIER.fullmatch(found)) else found
    whole = [words.index(known) for known in (stem, found) if known in words]
    if whole:
        return False, whole[0]
    return True, min((words.index(part) for part in found.split("_") if part in words), default=len(words))


def names_query(name: str) -> bool:
    """Return True for a name of search queries."""
    return _among(name, _QUERIES, last_too=False)


def names_time(name: str) -> bool:
    """Return True for a name of times: timestamp, clicked_at."""
    return _among(name, _TIMES)


def names_duration(name: str) -> bool:
    """Return True for a name of how long something takes, or of a part of a clock: watch_time, hour_of_day."""
    words = plain(name).split("_")
    return (words[-1] == "time" and bool({*words} & {*_DURATIONS.split()})) or "of" in words[1:-1]


def names_other_time(name: str) -> bool:
    """Return True for a name of a time of a user, an item or a file, or of what comes after an interaction: signup_date, delivered_at."""
    words = plain(name).split("_")
    return bool({*words} & {*_OTHER_TIMES.split()}) or "sign_up" in plain(name)


def is_time(name: str) -> bool:
    """Return True for a name that is known as one of times as a whole."""
    return _among(name, _TIMES, last_too=False)


def names_day(name: str) -> bool:
    """Return True for a name of days."""
    return plain(name) == "day"


def names_part_of_date(name: str) -> bool:
    """Return True for a name of the months or years beside which a day is one of a month."""
    return plain(name) in ("month", "year")


def names_part_of_time(name: str) -> bool:
    """Return True for a name of a part of a date or of a time of day, which is no id: month, week, hour."""
    return plain(name) in (
        "month",
        "quarter",
        "week",
        "weekday",
        "day",
        "day_of_week",
        "day_of_month",
        "dow",
        "hour",
        "minute",
    )


def names_year(name: str) -> bool:
    """Return True for a name of years: year, yearID, season."""
    found = plain(name)
    return (m[1] if (m := _IDENTIFIER.fullmatch(found)) else found) in ("year", "yr", "season")


def names_elapsed(name: str) -> bool:
    """Return True for a name of numbers that pass with time, such as days since a user came: days, visit_day, age, month."""
    return _among(name, "day days week weeks month months hour hours minute minutes second seconds age elapsed t")


def names_label(name: str) -> bool:
    """Return True for a name of ratings and outcomes."""
    return _among(name, _LABELS)


def names_weight(name: str) -> bool:
    """Return True for a name of weights."""
    return _among(name, _WEIGHTS, last_too=False)


def names_event(name: str) -> bool:
    """Return True for a name of the types of events."""
    return _among(name, _EVENTS, last_too=False)


def names_outcome(name: str) -> bool:
    """Return True for a name of what came of an interaction: purchased, is_click."""
    return names_label(name) or _among(name, _OUTCOMES)


def event_rule(kind: str) -> str | float | None:
    """Return what `schema.events` says of a type of events by its name: "ignored", "negative" or 1; None for an unknown one."""
    found = plain(kind)
    first, _, rest = found.partition("_")
    last = found.rpartition("_")[2]
    if found not in _REFUSALS.split() and first in _NOT and rest:  # no_click is a refusal, not_skipped is not known
        return "negative" if names_refusal(found) else None
    shown = first in _IMPRESSIONS.split() and last not in _CHOICES.split()
    if shown and first == "show" and rest:  # show_item, and not show_phone, which a user asks for
        shown = last in f"{_ITEMS} list feed card banner".split()
    if last in _IMPRESSIONS.split() or shown:
        return "ignored"
    if _ends(kind) & {*_REFUSALS.split()}:
        return "negative"
    return 1 if _ends(kind) & {*_CHOICES.split()} else None


def names_undoing(name: str) -> bool:
    """Return True for a name of what takes an earlier choice back: remove_from_cart, refund."""
    return bool(_ends(name) & {*_UNDOINGS.split()})


def names_refusal(name: str) -> bool:
    """Return True for a name of what users refused, whose 1 is no positive: dislike, is_hate, skip_2, non_click."""
    found = re.sub(r"_?[0-9]+$", "", plain(name)).removeprefix("is_")
    first, _, rest = found.partition("_")
    last = found.rpartition("_")[2]
    if found in _REFUSALS.split():
        return True
    if first in _NOT:
        chosen = {*f"{_CHOICES} {_LABELS} {_OUTCOMES}".split()}
        return bool(_ends(rest) & chosen) and not _ends(rest) & {*_REFUSALS.split()}
    told = {found, last} | ({first} if last in f"{_LABELS} flag count".split() else set())
    return found in ("nonclk", "nonclick", "noclick") or bool(told & {*_REFUSALS.split()})


def _ends(name: str) -> set[str]:
    """Return a name, its first and its last word."""
    found = plain(name)
    return {found, found.partition("_")[0], found.rpartition("_")[2]}


def names_quantity(name: str) -> bool:
    """Return True for a name of how many were bought."""
    return _among(name, "quantity qty units pieces")


def names_order(name: str) -> bool:
    """Return True for a name of orders or of their numbers: order_no, receipt."""
    return _names_id(name, _ORDERS)


def names_place(name: str) -> bool:
    """Return True for a name of places in a list: position, step."""
    return _among(name, _PLACES)


def names_post_code(name: str) -> bool:
    """Return True for a name of post codes: postcode, zip_code."""
    return plain(name) in [
        "postcode",
        "post_code",
        "zip",
        "zipcode",
        "zip_code",
        "postalcode",
        "postal_code",
        "postal",
        "postnumber",
        "plz",
    ]


def names_code(name: str) -> bool:
    """Return True for a name of codes, whose order says nothing where they are numbers: brand_id, colourCode, seller, department_no. Near post
    codes are near places, and a word of a quantity before another one tells no code: rank_in_category, distance_to_city."""
    found = plain(name)
    if _tells_post_code(name):
        return False
    stem = m[1] if (m := _IDENTIFIER.fullmatch(found)) else found
    is_quantity = bool({*found.split("_")[:-1]} & {*_QUANTITIES.split()})
    return bool(_CODE.fullmatch(found)) or (stem.rpartition("_")[2] in _CODES.split() and not is_quantity)


def names_change(name: str) -> bool:
    """Return True for a name of dates that change with the rows: last_review, updated_at."""
    return bool({*plain(name).split("_")} & {*_CHANGES.split()})


def names_measure(name: str) -> bool:
    """Return True for a name of numbers that are alike where they are near: release_year, age, pages, num_rooms."""
    words = plain(name).split("_")
    is_other = names_code(name) or words[-1] == "by" or words[-1] in _CODES.split()
    return bool({*words} & {*_MEASURES.split()}) and not is_other


def names_amount(name: str) -> bool:
    """Return True for a name of numbers that say how much or how many: amount, weight, days, price."""
    return _among(name, _AMOUNTS) or names_weight(name) or names_measure(name) or names_elapsed(name)


def names_count(name: str) -> bool:
    """Return True for a name of how often or how long an item was taken: plays, watch_time, total_quantity."""
    return _among(name, f"{_AMOUNTS} {_COUNTS}")


def ends_of_edges(columns: Iterable[str]) -> tuple[str, str] | None:
    """Return the columns of the two ends of edges, which their names tell as a pair: source and target, from_id and to_id. None
    without such a pair."""
    ends = {_END.sub("", _without_identifier(plain(name))): name for name in reversed([*columns])}
    return next(((ends[one], ends[other]) for one, other in _EDGES if {one, other} <= {*ends}), None)


def _without_identifier(found: str) -> str:
    return m[1] if (m := _IDENTIFIER.fullmatch(found)) else found


def _tells_post_code(name: str) -> bool:
    """Return True for a name of post codes, or of their ids."""
    m = re.fullmatch(r"(.*?)_(?:id|ids|key|no|nr)", plain(name))
    return names_post_code(name) or (m is not None and names_post_code(m[1]))


def names_title(name: str) -> bool:
    """Return True for a name of what people read: title, product_name."""
    return _among(name, _TITLES)


def names_phrase(name: str) -> bool:
    """Return True for a name of what people read or type."""
    return names_title(name) or names_query(name)


def is_known(name: str) -> bool:
    """Return True for a name of any meaning."""
    tests = (names_user, names_item, names_query, names_time, names_label, names_weight, names_event)
    return any(test(name) for test in tests)
