// The texts of the page in both languages. `t` fills in {names}.

export const words = {
  page_title: { en: "twotower console", zh: "twotower 控制台" },
  console: { en: "console", zh: "控制台" },
  skip: { en: "Skip to the answers", zh: "跳到推荐结果" },
  theme: { en: "Light or dark", zh: "浅色或深色" },
  other_language: { en: "中文", zh: "English" },
  facts: { en: "{users} users · {items} items · recall {recall}", zh: "{users} 位用户 · {items} 个物品 · 召回率 {recall}" },
  facts_bare: { en: "{users} users · {items} items", zh: "{users} 位用户 · {items} 个物品" },

  user: { en: "User", zh: "用户" },
  user_named: { en: "User {id}", zh: "用户 {id}" },
  choose_user: { en: "Choose a user by id", zh: "按 id 选择用户" },
  choose_user_hint: { en: "Search users by id", zh: "按 id 搜索用户" },
  new_user: { en: "New user", zh: "新用户" },
  new_note: { en: "No id and no history. Set features, or add items below.", zh: "没有 id，也没有历史。可以填写特征，或在下面加入物品。" },
  events_n: { en: "{n} events", zh: "{n} 个事件" },
  features: { en: "Features", zh: "特征" },
  features_changed: { en: "Changed: method 2 uses the new value.", zh: "已修改：方法 2 使用新值。" },
  features_restore: { en: "Restore", zh: "恢复" },
  context: { en: "Context", zh: "上下文" },
  context_note: { en: "Values of the moment that the model reads.", zh: "模型读取的此刻的值。" },
  context_now: { en: "now", zh: "现在" },
  no_options: { en: "Nothing found", zh: "没有找到" },
  options_n: { en: "{shown} of {total} shown", zh: "显示 {total} 项中的 {shown} 项" },

  added: { en: "Added events", zh: "新加入的事件" },
  added_none: { en: "Click an item in a list or on the map to add it to the history as liked.", zh: "点击列表或地图中的物品，将其作为“喜欢”加入历史。" },
  search_items: { en: "Search items to add", zh: "搜索要加入的物品" },
  search_items_hint: { en: "Search items by title", zh: "按标题搜索物品" },
  liked: { en: "liked", zh: "喜欢" },
  disliked: { en: "disliked", zh: "不喜欢" },
  now_liked: { en: "{title}: liked. Press for disliked", zh: "{title}：喜欢。按下改为不喜欢" },
  now_disliked: { en: "{title}: disliked. Press for liked", zh: "{title}：不喜欢。按下改为喜欢" },
  type_of: { en: "Type of the event: {title}", zh: "事件类型：{title}" },
  type_untold: { en: "no type", zh: "无类型" },
  take_away: { en: "Remove {title}", zh: "移除 {title}" },
  send: { en: "Send as recent events", zh: "作为近期事件发送" },
  forget: { en: "Delete recent events", zh: "删除近期事件" },
  recent: { en: "Recent events", zh: "近期事件" },
  sent: { en: "Sent. The service keeps {n} recent events of user {id}.", zh: "已发送。服务为用户 {id} 保存了 {n} 个近期事件。" },
  forgotten: { en: "The recent events of user {id} are deleted.", zh: "用户 {id} 的近期事件已删除。" },
  history: { en: "History", zh: "历史" },
  history_none: { en: "No events.", zh: "没有事件。" },
  history_unread: { en: "This model's user tower does not read a history: events only exclude items.", zh: "此模型的用户塔不读取历史：事件只会排除物品。" },
  history_last: { en: "Latest first; {shown} of {n}.", zh: "最新的在前；{n} 个中的 {shown} 个。" },
  history_all: { en: "Latest first.", zh: "最新的在前。" },

  answers: { en: "Answers", zh: "推荐结果" },
  request: { en: "The request", zh: "请求" },
  k: { en: "Number of items", zh: "物品数量" },
  filter: { en: "Filter of items", zh: "物品过滤" },
  where_column: { en: "Only where", zh: "仅限" },
  where_value: { en: "is", zh: "等于" },
  where_any: { en: "any item", zh: "任意物品" },
  compare: { en: "Compare with bundle", zh: "对比发布包" },
  compare_none: { en: "none", zh: "不对比" },
  bundle_current: { en: "{id} (served)", zh: "{id}（当前）" },
  bundle_plain: { en: "{id}", zh: "{id}" },
  bundle_damaged: { en: "{id} (damaged)", zh: "{id}（已损坏）" },
  banned: { en: "Banned", zh: "已禁用" },
  unban: { en: "Allow {title} again", zh: "重新允许 {title}" },
  method_1: { en: "Method 1", zh: "方法 1" },
  method_2: { en: "Method 2", zh: "方法 2" },
  method_1_short: { en: "Method 1", zh: "方法 1" },
  method_2_short: { en: "Method 2", zh: "方法 2" },
  by_1: { en: "precomputed user vector", zh: "预先计算的用户向量" },
  by_2: { en: "online user tower", zh: "在线用户塔" },
  by_popular: { en: "no precomputed vector", zh: "没有预先计算的向量" },
  other_bundle: { en: "Other bundle", zh: "另一个发布包" },
  by_other: { en: "method {method}", zh: "方法 {method}" },
  overlap: { en: "{n} of {k} are the same", zh: "{k} 个中有 {n} 个相同" },
  same: { en: "The same answer as method 1", zh: "与方法 1 的结果相同" },
  changed: { en: "{n} items not in the answer of method 1", zh: "有 {n} 个物品不在方法 1 的结果中" },
  reordered: { en: "The same items as method 1, in another order", zh: "与方法 1 的物品相同，次序不同" },
  new_user_1: { en: "A new user has no precomputed vector: these are the most popular items.", zh: "新用户没有预先计算的向量：返回最流行的物品。" },
  changed_1: { en: "The precomputed vector does not reflect changed features.", zh: "预先计算的向量不反映修改后的特征。" },
  ms: { en: "{n} ms", zh: "{n} 毫秒" },
  source_model: { en: "model", zh: "模型" },
  source_cold_start: { en: "cold start", zh: "冷启动" },
  source_popular: { en: "popular", zh: "热门" },
  source_fallback: { en: "popular (the index does not answer)", zh: "热门（索引无响应）" },
  recent_used: { en: "{n} recent events", zh: "{n} 个近期事件" },
  truncated: { en: "Fewer items than requested pass the filters.", zh: "通过过滤的物品少于请求的数量。" },
  nothing: { en: "No item passes the filters.", zh: "没有物品通过过滤。" },
  unknown: { en: "Unknown to the model: {names}", zh: "模型从未见过：{names}" },
  waiting: { en: "Loading", zh: "加载中" },
  no_answer: { en: "No answer", zh: "没有结果" },
  up: { en: "up {n}", zh: "上升 {n}" },
  down: { en: "down {n}", zh: "下降 {n}" },
  fresh: { en: "new", zh: "新" },
  gone: { en: "not in the other answer", zh: "不在另一个结果中" },
  add_liked: { en: "Add {title} as liked", zh: "将 {title} 作为喜欢加入" },
  add_disliked: { en: "Add {title} as disliked", zh: "将 {title} 作为不喜欢加入" },
  ban: { en: "Ban {title}", zh: "禁用 {title}" },
  look: { en: "Why {title}? Similar items", zh: "为什么是 {title}？相似物品" },
  rows_help: {
    en: "Up and Down move between items, Left and Right between the actions of an item. Enter on a title adds the item as liked.",
    zh: "上下键在物品间移动，左右键在物品的操作间移动。在标题上按 Enter 将物品作为喜欢加入。",
  },
  score: { en: "score {n}", zh: "分数 {n}" },
  rank: { en: "rank {n}", zh: "第 {n} 名" },
  status_answer: { en: "Method 2, {n} items. First: {title}. {change}.", zh: "方法 2，{n} 个物品。第一：{title}。{change}。" },
  status_added: { en: "{title} added as {kind}.", zh: "{title} 已作为{kind}加入。" },
  status_removed: { en: "{title} removed.", zh: "{title} 已移除。" },
  status_banned: { en: "{title} banned.", zh: "{title} 已禁用。" },

  map: { en: "Map of the items", zh: "物品地图" },
  map_view: { en: "View of the map", zh: "地图视野" },
  whole: { en: "Whole", zh: "全部" },
  close_up: { en: "Around the answer", zh: "推荐附近" },
  colour_by: { en: "Colour by", zh: "着色" },
  legend: { en: "Groups. Press one to show it alone", zh: "分组。按下可单独显示" },
  others: { en: "others", zh: "其他" },
  map_label: { en: "Map of the items, with the user and the recommended items", zh: "物品地图，含用户与推荐的物品" },
  map_help: {
    en: "Arrow keys move between the recommended items. Enter adds one as liked, Shift+Enter as disliked.",
    zh: "方向键在推荐的物品间移动。Enter 作为喜欢加入，Shift+Enter 作为不喜欢加入。",
  },
  map_all: { en: "All {n} items.", zh: "全部 {n} 个物品。" },
  map_some: { en: "The {n} most popular of {all} items, including {best} of the recommended ones.", zh: "{all} 个物品中最流行的 {n} 个，其中包括 {best} 个推荐的物品。" },
  new_point: { en: "new user", zh: "新用户" },

  gates: { en: "Gates of this request", zh: "本次请求的门控" },
  explains: { en: "Explained answer", zh: "解释的结果" },
  gates_note: { en: "Share of each field that the SENet gate passes to the user tower.", zh: "SENet 门控让每个特征域进入用户塔的比例。" },
  gates_none: { en: "This model has no gates.", zh: "此模型没有门控。" },
  gates_popular: { en: "The user tower was not run: these are the most popular items.", zh: "没有计算用户塔：返回最流行的物品。" },
  gates_1: { en: "This answer did not use the gates.", zh: "这个结果没有使用门控。" },
  norm: { en: "Norm of the user vector: {n}.", zh: "用户向量的范数：{n}。" },


  filtered: { en: "Excluded items", zh: "被排除的物品" },
  sum_seen: { en: "in the history", zh: "在历史中" },
  sum_banned: { en: "banned", zh: "已禁用" },
  sum_where: { en: "pass the filter", zh: "通过过滤" },
  left_best: { en: "Best excluded items", zh: "被排除物品中最佳的" },
  left_none: { en: "No excluded item would rank among the best.", zh: "被排除的物品都不会进入最佳之列。" },

  similar: { en: "Similar items", zh: "相似物品" },
  similar_in_history: { en: "Most similar in the history", zh: "历史中最相似的" },
  similar_in_history_none: { en: "No item of the history is among the {n} most similar items.", zh: "历史中没有物品在最相似的 {n} 个之内。" },
  chosen_rank: { en: "Id {id}. Method 1: {one}. Method 2: {two}.", zh: "Id {id}。方法 1：{one}。方法 2：{two}。" },
  not_best: { en: "not in the answer", zh: "不在结果中" },
  close: { en: "Close", zh: "关闭" },

  key_title: { en: "API key", zh: "API 密钥" },
  key_note: { en: "The service needs an API key. It is kept until this tab is closed.", zh: "此服务需要 API 密钥。密钥只保存到此标签页关闭为止。" },
  key: { en: "Key", zh: "密钥" },
  key_use: { en: "Use", zh: "使用" },
  cancel: { en: "Cancel", zh: "取消" },

  again: { en: "Try again", zh: "重试" },
  request_id: { en: "request {id}", zh: "请求 {id}" },
  problem_0: { en: "The service cannot be reached.", zh: "无法连接服务。" },
  problem_400: { en: "The service cannot use this request.", zh: "服务无法处理此请求。" },
  problem_401: { en: "The service needs a valid API key.", zh: "服务需要有效的 API 密钥。" },
  problem_403: { en: "The key does not allow this request.", zh: "此密钥不允许此请求。" },
  problem_404: { en: "The service has no such entry.", zh: "服务中没有这一项。" },
  problem_413: { en: "The request is too large.", zh: "请求过大。" },
  problem_429: { en: "Too many requests. Wait {seconds} s.", zh: "请求过多，请等待 {seconds} 秒。" },
  problem_500: { en: "The service failed.", zh: "服务出错。" },
  problem_503: { en: "The service is too busy or not ready. Wait {seconds} s.", zh: "服务繁忙或尚未就绪，请等待 {seconds} 秒。" },
};

export const languages = ["en", "zh"];

let language = "en";

export function speak(wanted) {
  language = languages.includes(wanted) ? wanted : "en";
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  document.title = t("page_title");
  for (const e of document.querySelectorAll("[data-text]")) e.textContent = t(e.dataset.text);
  for (const e of document.querySelectorAll("[data-label]")) e.setAttribute("aria-label", t(e.dataset.label));
  for (const e of document.querySelectorAll("[data-placeholder]")) e.placeholder = t(e.dataset.placeholder);
}

export const spoken = () => language;

export function t(key, values = {}) {
  return words[key][language].replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

export const number = (n, digits = 0) =>
  new Intl.NumberFormat(language === "zh" ? "zh-CN" : "en", { minimumFractionDigits: digits, maximumFractionDigits: digits }).format(n);
