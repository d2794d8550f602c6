// Asks a server with the `openai` package of npm: plainly, as a stream, and with a tool. Prints what came as JSON.
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({baseURL, apiKey: "none", maxRetries: 0});
const ask = {model, messages: [{role: "user", content: "Count from one to five."}], max_tokens: 24, temperature: 0};

const plain = await client.chat.completions.create(ask);

const pieces = [];
for await (const chunk of await client.chat.completions.create({...ask, stream: true})) {
  pieces.push(chunk.choices[0]?.delta?.content ?? "");
}

const tool = {
  type: "function",
  function: {name: "add", parameters: {type: "object", properties: {a: {type: "number"}, b: {type: "number"}}, required: ["a", "b"]}},
};
const question = [{role: "user", content: "What is 2 + 3? Use the tool."}];
const called = await client.chat.completions.create({...ask, messages: question, tools: [tool], tool_choice: "required", max_tokens: 64});

console.log(JSON.stringify({
  plain: plain.choices[0].message.content,
  pieces: pieces.filter((each) => each !== ""),
  tool: called.choices[0].message.tool_calls?.[0]?.function?.name ?? null,
}));
